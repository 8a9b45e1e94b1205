"""What everything stands on: errors, files, schedules, bundles."""
