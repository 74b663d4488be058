"""What a figure is: metrics, figures, budgets and the verdict on them."""
