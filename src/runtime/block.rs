//! Blocks of small tensors that go between host and device in one copy: what a run reads that the host writes, and what it
//! writes that the host reads. On the CPU the copy is one of memory, so that the path is the same.

use recaption_export::DataType;

use crate::error::Result;
use crate::runtime::buffer::{Buffer, Element, TensorView};
use crate::runtime::session::Session;

/// TensorRT wants the tensors that it is given at multiples of so many bytes.
const ALIGNMENT: usize = 256;

/// Tensors one after the other, on the host and on the device.
pub(crate) struct Block {
    staging: Buffer,
    device: Buffer,
    tensors: Vec<Place>,
}

#[derive(Clone, Copy)]
struct Place {
    offset: usize,
    data_type: DataType,
    num_elements: usize,
}

impl Block {
    /// Zeroed tensors of these types and sizes, on the device of `session`.
    pub(crate) fn new(session: &Session, tensors: &[(DataType, usize)]) -> Result<Self> {
        let mut num_bytes = 0;
        let places = tensors.iter().map(|&(data_type, num_elements)| {
            let place = Place { offset: num_bytes, data_type, num_elements };
            num_bytes += (num_elements * data_type.size()).next_multiple_of(ALIGNMENT);
            place
        });
        let tensors = places.collect();
        Ok(Self {
            staging: session.staging_buffer(DataType::U8, num_bytes)?,
            device: session.device_buffer(DataType::U8, num_bytes)?,
            tensors,
        })
    }

    /// The host's copy of tensor `index`.
    pub(crate) fn tensor<T: Element>(&self, index: usize) -> &[T] {
        let Place { offset, num_elements, .. } = self.place::<T>(index);
        self.staging.part(offset, num_elements)
    }

    /// As [`Self::tensor`], to be changed.
    pub(crate) fn tensor_mut<T: Element>(&mut self, index: usize) -> &mut [T] {
        let Place { offset, num_elements, .. } = self.place::<T>(index);
        self.staging.part_mut(offset, num_elements)
    }

    fn place<T: Element>(&self, index: usize) -> Place {
        let place = self.tensors[index];
        assert!(place.data_type == T::DATA_TYPE, "bug: {:?} taken as another", place.data_type);
        place
    }

    /// The start of the device's copy of tensor `index`, shaped.
    pub(crate) fn view(&self, index: usize, shape: &[usize]) -> Result<TensorView> {
        let Place { offset, data_type, num_elements } = self.tensors[index];
        assert!(shape.iter().product::<usize>() <= num_elements, "bug: view {shape:?} of {num_elements}");
        self.device.view_as(offset, data_type, shape)
    }

    /// Sends the host's tensors to the device; they must not change before the next wait.
    pub(crate) fn send(&mut self, session: &Session) -> Result<()> {
        let num_bytes = self.staging.num_bytes();
        session.stream().upload(&self.staging, &mut self.device, num_bytes)
    }

    /// Sends the first `num_elements` of the only tensor.
    pub(crate) fn send_first(&mut self, session: &Session, num_elements: usize) -> Result<()> {
        let num_bytes = num_elements * self.tensors[0].data_type.size();
        session.stream().upload(&self.staging, &mut self.device, num_bytes)
    }

    /// Fetches the first `num_elements` of the only tensor, and waits for them and all before.
    pub(crate) fn receive_first(&mut self, session: &Session, num_elements: usize) -> Result<()> {
        let num_bytes = num_elements * self.tensors[0].data_type.size();
        session.stream().download(&self.device, &mut self.staging, num_bytes)?;
        session.stream().synchronize()
    }
}
