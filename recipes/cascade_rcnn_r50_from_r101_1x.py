_base_ = "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["sea_kernels.mmdet"], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type="SEADistilled",
    student="mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    teacher="mmdet::cascade_rcnn/cascade-rcnn_r101_fpn_20e_coco.py",
    teacher_checkpoint="https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_rcnn_r101_fpn_20e_coco/cascade_rcnn_r101_fpn_20e_coco_bbox_mAP-0.425_20200504_231812-5057dcc5.pth",
)
