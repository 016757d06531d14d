"""What is learnt?"""
