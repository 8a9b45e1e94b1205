"""The foundations of all other packages: errors, files, noise schedules, bundles, machine facts."""
