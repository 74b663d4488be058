"""report.html and report.md, made from what a release's stages recorded."""
