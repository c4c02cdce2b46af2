"""What a memory is asked: facts planted in real text, answers generated and compared to the letter."""
