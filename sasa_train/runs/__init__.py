"""Run folders and sweep folders: each of their files is read and written by one module here."""
