"""One module a subcommand; each reads its options, calls the libraries and shows the result."""
