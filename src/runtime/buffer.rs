//! Memory that graphs read and write. A [`Buffer`] owns it; a [`TensorView`] is a shaped window into it that can be
//! bound as an input and as an output at once, which is how the KV cache is updated in place.
//!
//! Views are made through `CreateTensorWithDataAsOrtValue` and handed to `ort` as owned values: binding a borrowed
//! tensor of `ort` deadlocks in 2.0.0-rc.15 (it clones the tensor while it holds the tensor's lock).

use std::ptr::{self, NonNull};
use std::sync::Arc;

use ort::AsPointer;
use ort::memory::Allocator;
use ort::value::{DynTensor, DynTensorValueType, DynValue, TensorElementType, Value};
use recaption_export::DataType;

use crate::error::{Error, Result};

/// The allocation behind a buffer and its views.
pub(crate) struct Storage {
    tensor: DynTensor,
}

// SAFETY: the tensor is only asked for its address and memory info, which do not change, and freed when the last owner
// drops it; ONNX Runtime's allocators may be used from any thread. The contents are guarded by `Buffer`'s `&mut`.
unsafe impl Sync for Storage {}

/// A type that tensors hold.
pub(crate) trait Element: Copy + 'static {
    const DATA_TYPE: DataType;
}

impl Element for f32 {
    const DATA_TYPE: DataType = DataType::F32;
}

impl Element for u8 {
    const DATA_TYPE: DataType = DataType::U8;
}

impl Element for i32 {
    const DATA_TYPE: DataType = DataType::I32;
}

impl Element for i64 {
    const DATA_TYPE: DataType = DataType::I64;
}

/// Owned memory, on the host or on a device.
pub(crate) struct Buffer {
    storage: Arc<Storage>,
    data_type: DataType,
    num_elements: usize,
    data: NonNull<u8>,
}

// SAFETY: `data` points into `storage`, which the buffer keeps alive and which may move between threads.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Zeroed where the host can reach it; on a device the contents are undefined.
    pub(crate) fn new(allocator: &Allocator, data_type: DataType, num_elements: usize) -> Result<Self> {
        let doing = || format!("allocate {:.1} MiB", (num_elements * data_type.size()) as f64 / f64::from(1 << 20));
        let mut tensor =
            DynTensor::new(allocator, element_type(data_type), [num_elements]).map_err(Error::ort(doing()))?;
        let data = NonNull::new(tensor.data_ptr_mut().cast::<u8>()).unwrap_or(NonNull::dangling());
        Ok(Self { storage: Arc::new(Storage { tensor }), data_type, num_elements, data })
    }

    /// Zeroed host memory.
    pub(crate) fn host(data_type: DataType, num_elements: usize) -> Result<Self> {
        Self::new(&Allocator::default(), data_type, num_elements)
    }

    /// Whether the host can read and write the memory.
    pub(crate) fn is_host(&self) -> bool {
        self.storage.tensor.memory_info().is_cpu_accessible()
    }

    /// The contents. Must not be called while a graph runs on a view of the buffer.
    pub(crate) fn as_slice<T: Element>(&self) -> &[T] {
        self.check::<T>();
        // SAFETY: host memory of `num_elements` elements of this type, initialised to zero when allocated.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast::<T>(), self.num_elements) }
    }

    /// The contents, to be changed. Must not be called while a graph runs on a view of the buffer.
    pub(crate) fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        self.check::<T>();
        // SAFETY: as in `as_slice`; views hand the memory to ONNX Runtime only, during runs on this thread.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().cast::<T>(), self.num_elements) }
    }

    /// The contents as bytes, whatever their type.
    pub(crate) fn as_mut_bytes(&mut self) -> &mut [u8] {
        assert!(self.is_host(), "bug: device memory read by the host");
        // SAFETY: host memory of so many bytes, initialised to zero when allocated; any bytes are valid numbers.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.num_elements * self.data_type.size()) }
    }

    fn check<T: Element>(&self) {
        assert!(
            self.data_type == T::DATA_TYPE && self.is_host(),
            "bug: buffer of {:?} read as another",
            self.data_type
        );
    }

    /// Copies `num_elements` elements from one place of the buffer to another, on the device that holds it.
    pub(crate) fn copy_within_device(&mut self, from: usize, to: usize, num_elements: usize) -> Result<()> {
        let tensor = |offset| {
            let view = self.view(offset, &[num_elements])?;
            view.value.downcast::<DynTensorValueType>().map_err(Error::ort("view a device buffer"))
        };
        let (source, target) = (tensor(from)?, tensor(to)?);
        source.copy_into(target).map_err(Error::ort("copy within a device buffer"))
    }

    /// A window of `shape`, starting `offset` elements into the buffer.
    pub(crate) fn view(&self, offset: usize, shape: &[usize]) -> Result<TensorView> {
        let num_elements: usize = shape.iter().product();
        assert!(offset + num_elements <= self.num_elements, "bug: view {shape:?} at {offset} of {}", self.num_elements);
        let dims: Vec<i64> = shape.iter().map(|&dim| dim as i64).collect();
        let mut value: *mut ort::sys::OrtValue = ptr::null_mut();
        // SAFETY: the pointer, length and shape describe memory inside the allocation (checked above), which the view
        // keeps alive through `owner`; the memory info is the allocation's own.
        let status = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                self.storage.tensor.memory_info().ptr(),
                self.data.as_ptr().add(offset * self.data_type.size()).cast(),
                num_elements * self.data_type.size(),
                dims.as_ptr(),
                dims.len(),
                element_type(self.data_type).into(),
                &raw mut value,
            )
        };
        // SAFETY: the status comes from the call above and is consumed once.
        unsafe { ort::Error::<()>::result_from_status(status) }.map_err(Error::ort("make a tensor view"))?;
        let value = NonNull::new(value).expect("bug: ONNX Runtime reported success without a value");
        // SAFETY: a fresh, valid value that nobody else owns; it holds no memory of its own, so any allocator does.
        let value: DynValue = unsafe { Value::from_ptr(value, Some(&Allocator::default())) };
        Ok(TensorView { value, owner: Arc::clone(&self.storage) })
    }
}

/// A shaped window into a [`Buffer`].
pub(crate) struct TensorView {
    value: DynValue,
    owner: Arc<Storage>,
}

impl TensorView {
    pub(super) fn value(&self) -> &DynValue {
        &self.value
    }

    pub(super) fn into_value(self) -> DynValue {
        self.value
    }

    pub(super) fn owner(&self) -> Arc<Storage> {
        Arc::clone(&self.owner)
    }
}

fn element_type(data_type: DataType) -> TensorElementType {
    match data_type {
        DataType::F32 => TensorElementType::Float32,
        DataType::F16 => TensorElementType::Float16,
        DataType::BF16 => TensorElementType::Bfloat16,
        DataType::U8 => TensorElementType::Uint8,
        DataType::I8 => TensorElementType::Int8,
        DataType::I32 => TensorElementType::Int32,
        DataType::I64 => TensorElementType::Int64,
    }
}
