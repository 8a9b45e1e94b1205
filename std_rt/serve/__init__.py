"""A browser: the page, the API, and sessions that share one stylizer. Needs the extra [serve]."""
