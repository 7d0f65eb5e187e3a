"""One file a verb: options in, a call of the library, words out."""
