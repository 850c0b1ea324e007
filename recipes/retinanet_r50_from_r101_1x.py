_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["sea_kernels.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="SEADistilled",
    student="mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    teacher="mmdet::retinanet/retinanet_r101_fpn_ms-640-800-3x_coco.py",
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_mstrain_3x_coco/retinanet_r101_fpn_mstrain_3x_coco_20210720_214650-7ee888e0.pth",
)
