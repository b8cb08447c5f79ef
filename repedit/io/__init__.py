"""The doors through which files come in and go out: each one reads or writes one kind of file, and refuses what is damaged with a typed error."""
