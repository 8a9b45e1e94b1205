"""distil"""
