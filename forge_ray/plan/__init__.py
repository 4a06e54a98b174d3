"""What a model will cost before any money is spent: size, tokens, layout, memory, hours, money."""
