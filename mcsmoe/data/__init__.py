"""Where rows come from, what a task makes of them, and how they are batched."""
