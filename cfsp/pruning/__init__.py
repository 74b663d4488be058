"""CFSP: statistics, scores, plans, cuts and their closed-form repair."""
