"""Records, comparisons and devices as text: tables in Markdown, JSON and CSV."""
