//! A CLIP bundle, loaded: images and texts to embeddings, which are not normalised.

use std::path::Path;

use recaption_export::{ClipManifest, DataType, GraphFile};

use crate::error::{Error, Result};
use crate::model::bundle::check_files;
use crate::pipeline::preprocess::{PixelFormat, PixelValues};
use crate::runtime::Device;
use crate::runtime::buffer::{Buffer, TensorView};
use crate::runtime::session::{Session, SessionOptions};

/// Both towers of a CLIP.
pub struct Clip {
    image_tower: Session,
    text_tower: Session,
    manifest: ClipManifest,
}

impl Clip {
    /// Loads the bundle in `folder`.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is none of kind `clip`, else those of the device and of ONNX Runtime.
    pub fn open(folder: &Path, device: Device, num_threads: usize) -> Result<Self> {
        let manifest = ClipManifest::read(folder)?;
        check_files(folder, &manifest.header.files)?;
        let options = SessionOptions { device, num_threads, spin: true };
        let open = |graph: &GraphFile| Session::open(&folder.join(&graph.file), options);
        let (image_tower, text_tower) = (open(&manifest.graphs.image_tower)?, open(&manifest.graphs.text_tower)?);
        Ok(Self { image_tower, text_tower, manifest })
    }

    /// What the bundle says of itself.
    #[must_use]
    pub fn manifest(&self) -> &ClipManifest {
        &self.manifest
    }

    /// Embeddings of `images`, `[images, projection_dim]`.
    ///
    /// # Errors
    /// ONNX Runtime's.
    pub fn embed_images(&mut self, images: &[&PixelValues]) -> Result<Vec<f32>> {
        let format = PixelFormat::of_clip(&self.manifest);
        let mut pixel_values =
            Buffer::host(self.manifest.header.pixel_values.dtype, images.len() * format.num_values())?;
        images.iter().enumerate().for_each(|(i, image)| image.copy_to(&mut pixel_values, i));
        let pixel_values = pixel_values.view(0, &format.shape(images.len()))?;
        let shape = [images.len(), self.manifest.projection_dim];
        run(&mut self.image_tower, ("pixel_values", pixel_values), ("image_embeds", shape))
    }

    /// Embeddings of texts by their token ids, `[texts, projection_dim]`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a text that is empty or longer than the context, else ONNX Runtime's.
    pub fn embed_texts(&mut self, texts: &[Vec<u32>]) -> Result<Vec<f32>> {
        let Some(length) = texts.iter().map(Vec::len).max() else { return Ok(vec![]) };
        let context_length = self.manifest.text.context_length;
        if let Some(text) = texts.iter().find(|text| !(1..=context_length).contains(&text.len())) {
            return Err(Error::Setting {
                reason: format!("a text has {} tokens, the model takes 1 to {context_length}", text.len()),
                hint: "cut the text off, and keep its last token".to_owned(),
            });
        }
        // Zeros behind the end of a text have no influence, and are never taken for the end.
        let mut input_ids = Buffer::host(DataType::I64, texts.len() * length)?;
        for (row, text) in input_ids.as_mut_slice::<i64>().chunks_exact_mut(length).zip(texts) {
            row.iter_mut().zip(text).for_each(|(id, &token)| *id = i64::from(token));
        }
        let input_ids = input_ids.view(0, &[texts.len(), length])?;
        let shape = [texts.len(), self.manifest.projection_dim];
        run(&mut self.text_tower, ("input_ids", input_ids), ("text_embeds", shape))
    }
}

fn run(
    session: &mut Session,
    (input, tensor): (&str, TensorView),
    (output, shape): (&str, [usize; 2]),
) -> Result<Vec<f32>> {
    let embeds = Buffer::host(DataType::F32, shape.iter().product())?;
    let mut binding = session.binding()?;
    binding.bind_host_input(input, tensor)?;
    binding.bind_output(output, embeds.view(0, &shape)?)?;
    session.run(&mut binding)?;
    Ok(embeds.as_slice::<f32>().to_vec())
}
