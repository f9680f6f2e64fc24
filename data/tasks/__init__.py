"""Generated tasks for the embedded model, one file each."""
