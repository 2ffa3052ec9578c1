"""`run`: a whole job from one file, its steps reused when they are finished."""
