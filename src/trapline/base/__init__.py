"""What every room stands on: errors, exit codes, processes, files of unknown origin."""
