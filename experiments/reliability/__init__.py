"""What happens to runs that are killed, damaged, moved or starved?"""
