"""One file a family of attacks: what is done to a model before it is asked."""
