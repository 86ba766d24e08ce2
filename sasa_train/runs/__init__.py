"""Run folders and sweep folders; each kind of file in them is read and written by one module of this package."""
