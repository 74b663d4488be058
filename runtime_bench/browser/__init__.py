"""Models in a page: headless Chromium, a server on this machine, and the page's own scripts under `page/`."""
