//! Memory that graphs read and write. A [`Buffer`] owns it; a [`TensorView`] is a shaped window into it that can be
//! bound as an input and as an output at once, which is how the KV cache is updated in place.
//!
//! Views are made through `CreateTensorWithDataAsOrtValue` and handed to `ort` as owned values: binding a borrowed
//! tensor of `ort` deadlocks in 2.0.0-rc.15 (it clones the tensor while it holds the tensor's lock).

use std::ptr::{self, NonNull};
use std::sync::Arc;

use memmap2::MmapMut;
use ort::AsPointer;
use ort::memory::{Allocator, MemoryInfo};
use ort::value::{DynTensor, DynValue, TensorElementType, Value};
use recaption_export::DataType;

use crate::error::{Error, Result};

/// The allocation behind a buffer and its views.
pub(crate) enum Storage {
    /// An allocator's.
    Tensor(DynTensor),
    /// Pages that the system gives, zeroed, as they are first touched.
    Pages { _pages: MmapMut, info: MemoryInfo<'static> },
}

// SAFETY: a tensor is only asked for its address and memory info, which do not change, and freed when the last owner
// drops it; ONNX Runtime's allocators may be used from any thread. The contents are guarded by `Buffer`'s `&mut`.
unsafe impl Sync for Storage {}

impl Storage {
    fn info(&self) -> *const ort::sys::OrtMemoryInfo {
        match self {
            Self::Tensor(tensor) => tensor.memory_info().ptr(),
            Self::Pages { info, .. } => info.ptr(),
        }
    }
}

/// From this size on host memory is pages of its own: most of a KV cache is not touched before many images are in flight.
const MIN_PAGES: usize = 1 << 20;

/// A type that tensors hold.
pub(crate) trait Element: Copy + 'static {
    const DATA_TYPE: DataType;
}

impl Element for f32 {
    const DATA_TYPE: DataType = DataType::F32;
}

impl Element for half::f16 {
    const DATA_TYPE: DataType = DataType::F16;
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
    is_host: bool,
}

// SAFETY: `data` points into `storage`, which the buffer keeps alive and which may move between threads.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Memory of `allocator`; what is in it is undefined. `is_host`: the host can reach it.
    pub(super) fn new(allocator: &Allocator, is_host: bool, data_type: DataType, num_elements: usize) -> Result<Self> {
        let num_bytes = num_elements.saturating_mul(data_type.size());
        let doing = || format!("allocate {:.1} MiB", num_bytes as f64 / f64::from(1 << 20));
        let mut tensor =
            DynTensor::new(allocator, element_type(data_type), [num_elements]).map_err(Error::ort(doing()))?;
        let data = NonNull::new(tensor.data_ptr_mut().cast::<u8>()).unwrap_or(NonNull::dangling());
        Ok(Self { storage: Arc::new(Storage::Tensor(tensor)), data_type, num_elements, data, is_host })
    }

    /// Zeroed host memory.
    pub(crate) fn host(data_type: DataType, num_elements: usize) -> Result<Self> {
        if num_elements.saturating_mul(data_type.size()) >= MIN_PAGES
            && let Some(buffer) = Self::of_pages(data_type, num_elements)
        {
            return Ok(buffer);
        }
        let mut buffer = Self::new(&Allocator::default(), true, data_type, num_elements)?;
        buffer.zero_host();
        Ok(buffer)
    }

    /// Of zeroed pages, where the system gives any.
    fn of_pages(data_type: DataType, num_elements: usize) -> Option<Self> {
        let mut pages = MmapMut::map_anon(num_elements.checked_mul(data_type.size())?).ok()?;
        // Fewer faults, and fewer translations where a cache is read. Where there are no large ones, small ones do.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        let data = NonNull::new(pages.as_mut_ptr())?;
        let storage = Arc::new(Storage::Pages { _pages: pages, info: MemoryInfo::default() });
        Some(Self { storage, data_type, num_elements, data, is_host: true })
    }

    /// Fills host memory with zeros.
    pub(super) fn zero_host(&mut self) {
        assert!(self.is_host, "bug: device memory written by the host");
        // SAFETY: host memory of so many bytes.
        unsafe { self.data.as_ptr().write_bytes(0, self.num_bytes()) };
    }

    pub(crate) fn num_bytes(&self) -> usize {
        self.num_elements * self.data_type.size()
    }

    /// Where the memory is, for copies.
    pub(super) fn address(&self) -> NonNull<u8> {
        self.data
    }

    /// Part of the contents, `num_elements` of type `T` from byte `offset`, which is aligned for them; to be changed. Must
    /// not be called while a graph runs on a view of the buffer.
    pub(crate) fn part_mut<T: Element>(&mut self, offset: usize, num_elements: usize) -> &mut [T] {
        self.check_part::<T>(offset, num_elements);
        // SAFETY: host memory inside the allocation and aligned (both checked), zeroed when allocated; views hand it to ONNX
        // Runtime only, during runs on this thread.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().add(offset).cast::<T>(), num_elements) }
    }

    /// As [`Self::part_mut`], to be read.
    pub(crate) fn part<T: Element>(&self, offset: usize, num_elements: usize) -> &[T] {
        self.check_part::<T>(offset, num_elements);
        // SAFETY: as in `part_mut`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().add(offset).cast::<T>(), num_elements) }
    }

    fn check_part<T: Element>(&self, offset: usize, num_elements: usize) {
        let address = self.data.as_ptr() as usize + offset;
        let is_inside = offset + num_elements * size_of::<T>() <= self.num_bytes();
        assert!(
            self.is_host && is_inside && address.is_multiple_of(align_of::<T>()),
            "bug: {num_elements} x {} bytes at {offset} of {} read by the host",
            size_of::<T>(),
            self.num_bytes()
        );
    }

    /// A window of `shape`, starting `offset` elements into the buffer.
    pub(crate) fn view(&self, offset: usize, shape: &[usize]) -> Result<TensorView> {
        self.view_as(offset * self.data_type.size(), self.data_type, shape)
    }

    /// A window of `shape` that takes the bytes from `offset` on as `data_type`.
    pub(crate) fn view_as(&self, offset: usize, data_type: DataType, shape: &[usize]) -> Result<TensorView> {
        let num_bytes = shape.iter().product::<usize>() * data_type.size();
        assert!(offset + num_bytes <= self.num_bytes(), "bug: view {shape:?} at {offset} of {}", self.num_bytes());
        let dims: Vec<i64> = shape.iter().map(|&dim| dim as i64).collect();
        let mut value: *mut ort::sys::OrtValue = ptr::null_mut();
        // SAFETY: the pointer, length and shape describe memory inside the allocation (checked above), which the view
        // keeps alive through `owner`; the memory info is the allocation's own.
        let status = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                self.storage.info(),
                self.data.as_ptr().add(offset).cast(),
                num_bytes,
                dims.as_ptr(),
                dims.len(),
                element_type(data_type).into(),
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
        DataType::F8E4M3 => TensorElementType::Float8E4M3FN,
        DataType::I32 => TensorElementType::Int32,
        DataType::I64 => TensorElementType::Int64,
    }
}
