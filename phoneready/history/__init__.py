"""What past releases measured: series over runs, and where one changed by more than its noise."""
