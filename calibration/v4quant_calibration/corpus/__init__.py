"""Text: files read, chats rendered, tokens counted and cut into windows."""
