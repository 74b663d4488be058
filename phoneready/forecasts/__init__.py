"""What a stage will take, said before it begins."""
