"""sdxl_train.py on the tiny SDXL: whole runs, and what they must have in common."""
def test_x(train):
    import time
    t=time.time(); run=train(); print(time.time()-t, run.logged("loss/current"), run.events().Tags())
    t=time.time(); run=train("--max_train_steps=1"); print(time.time()-t, run.logged("loss/current"))
