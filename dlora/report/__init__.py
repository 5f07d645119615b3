"""What a run did, from the files that it wrote: a page to look at, and a live view; no torch."""
