"""The command line, and the release pipeline that strings the stages together."""
