"""What do we train on?"""
