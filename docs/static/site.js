document.addEventListener('input', e => {
  if (e.target.matches('.slider input')) e.target.parentNode.style.setProperty('--at', e.target.value + '%');
});
