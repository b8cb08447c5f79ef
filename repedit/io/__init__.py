"""Reading and writing files: each module handles one kind of file, and refuses a damaged one with a typed error."""
