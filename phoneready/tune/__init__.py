"""Find the largest reduction, or the best quality, that meets the budgets of a release."""
