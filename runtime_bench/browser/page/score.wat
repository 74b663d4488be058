;; A matrix times a vector in float32, four numbers at once: what a generated token is made of.
;; The matrix (rows x columns, columns a multiple of 16) lies at 64 KiB, the vector at 0, the result at 32 KiB.
(module
  (memory (export "memory") 32)
  (func (export "multiply") (param $rows i32) (param $columns i32)
    (local $matrix i32) (local $vector i32) (local $end i32) (local $row i32)
    (local $a v128) (local $b v128) (local $c v128) (local $d v128)
    (local.set $matrix (i32.const 65536))
    (local.set $end (i32.shl (local.get $columns) (i32.const 2)))
    (loop $rows_
      (local.set $a (v128.const f32x4 0 0 0 0))
      (local.set $b (v128.const f32x4 0 0 0 0))
      (local.set $c (v128.const f32x4 0 0 0 0))
      (local.set $d (v128.const f32x4 0 0 0 0))
      (local.set $vector (i32.const 0))
      (loop $columns_
        (local.set $a (f32x4.add (local.get $a)
          (f32x4.mul (v128.load (local.get $matrix)) (v128.load (local.get $vector)))))
        (local.set $b (f32x4.add (local.get $b)
          (f32x4.mul (v128.load offset=16 (local.get $matrix)) (v128.load offset=16 (local.get $vector)))))
        (local.set $c (f32x4.add (local.get $c)
          (f32x4.mul (v128.load offset=32 (local.get $matrix)) (v128.load offset=32 (local.get $vector)))))
        (local.set $d (f32x4.add (local.get $d)
          (f32x4.mul (v128.load offset=48 (local.get $matrix)) (v128.load offset=48 (local.get $vector)))))
        (local.set $matrix (i32.add (local.get $matrix) (i32.const 64)))
        (local.set $vector (i32.add (local.get $vector) (i32.const 64)))
        (br_if $columns_ (i32.lt_u (local.get $vector) (local.get $end))))
      (local.set $a (f32x4.add (f32x4.add (local.get $a) (local.get $b)) (f32x4.add (local.get $c) (local.get $d))))
      (f32.store offset=32768 (i32.shl (local.get $row) (i32.const 2))
        (f32.add
          (f32.add (f32x4.extract_lane 0 (local.get $a)) (f32x4.extract_lane 1 (local.get $a)))
          (f32.add (f32x4.extract_lane 2 (local.get $a)) (f32x4.extract_lane 3 (local.get $a)))))
      (local.set $row (i32.add (local.get $row) (i32.const 1)))
      (br_if $rows_ (i32.lt_u (local.get $row) (local.get $rows))))))
