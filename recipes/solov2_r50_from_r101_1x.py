_base_ = "mmdet::solov2/solov2_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["sea_kernels.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="SEADistilled",
    student="mmdet::solov2/solov2_r50_fpn_1x_coco.py",
    teacher="mmdet::solov2/solov2_r101_fpn_ms-3x_coco.py",
    teacher_checkpoint="work_dirs/solov2_r101_fpn_ms-3x_coco/epoch_36.pth",  # not published: train it
)
