"""How the shipped memory is made: cached states of the body, a curriculum of documents, a resumable loop."""
