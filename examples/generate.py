import llmpq

model = llmpq.load_model("tiny-tales")
cluster = llmpq.load_cluster("configs/clusters/03-opt30b-3xt4-1xv100.yaml")
workload = llmpq.load_workload("configs/workloads/quickstart.yaml")
plan = llmpq.plan(model, cluster, workload, time_limit_s=5)
engine = llmpq.Engine(plan)
for text in engine.generate(["Once upon a time", "The cat was sad"], new_tokens=24):
    print(text)
