"""What a program adds to qpa from outside: one thing a file, and no file of qpa edited for it."""
