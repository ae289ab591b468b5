"""report.html, a page of each kind of folder."""
