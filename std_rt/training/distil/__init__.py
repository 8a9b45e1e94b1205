"""Distillation: a slow base into a few-step LoRA."""
