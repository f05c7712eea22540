import llmpq

model = llmpq.load_model("tiny-tales")
cluster = llmpq.load_cluster("configs/clusters/03-opt30b-3xt4-1xv100.yaml")
workload = llmpq.load_workload("configs/workloads/quickstart.yaml")
plan = llmpq.plan(model, cluster, workload, time_limit_s=5)
for stage in plan.stages:
    print(stage.devices, stage.first_layer, stage.end_layer, stage.precisions)
print(f"{llmpq.simulate(plan).tokens_per_s:.0f} tokens/s")
