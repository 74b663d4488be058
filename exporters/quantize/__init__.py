"""Numbers of few bits for a text: which of a grid's each weight becomes, whatever file they are stored in."""
