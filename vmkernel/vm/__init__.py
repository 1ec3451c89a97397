"""One microVM: its command line, its process, its template, its life."""
