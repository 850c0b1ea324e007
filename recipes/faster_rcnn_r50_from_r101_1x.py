_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["sea_kernels.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="SEADistilled",
    student="mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    teacher="mmdet::faster_rcnn/faster-rcnn_r101_fpn_ms-3x_coco.py",
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_mstrain_3x_coco/faster_rcnn_r101_fpn_mstrain_3x_coco_20210524_110822-4d4d2ca8.pth",
)
