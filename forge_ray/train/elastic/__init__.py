"""Who trains together: seats, groups that follow each other, and one sum whoever computed its parts."""
