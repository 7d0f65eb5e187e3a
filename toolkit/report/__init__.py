"""What a run tells: on the terminal, as a page, as Markdown and as JSON."""
