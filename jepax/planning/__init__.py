"""What a run needs, found by compiling it ahead of time for chips that are not there."""
