"""The attacks, one file for each subject; every attack registers its record where it is written."""
