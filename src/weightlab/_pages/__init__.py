"""Self-contained HTML pages and the figures in them, for every room that shows what it found."""
